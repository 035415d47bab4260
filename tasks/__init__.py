"""Prefect tasks: every side effect, one function each, and no decisions (those are the kernel's)."""
