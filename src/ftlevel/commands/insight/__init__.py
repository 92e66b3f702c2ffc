"""What stands before and after a run: plan, report, doctor."""
