"""Prefect flows and the command line. Nothing else: a flow asks the kernel what is next and a task to do it."""
