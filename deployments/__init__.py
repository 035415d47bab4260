"""Where models answer: serving targets behind one protocol (`target.py`), one folder per target.

Belongs here: deploying, routing, observing, retiring. Does not: gates, verdicts, Prefect. (Prefect's own
"deployments" are another thing: they live in `prefect.yaml`.)
"""
