"""What a run does to fit into a device's memory, and what it says where it does not.

Takes a plan and a model that is ready to be trained; knows nothing of the steps.
"""
