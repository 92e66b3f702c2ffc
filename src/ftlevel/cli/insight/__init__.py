"""Commands about runs and machines that train nothing: plan, report, doctor."""
