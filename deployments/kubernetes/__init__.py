"""The Kubernetes serving target: a Deployment and a Service per version, one Gateway API HTTPRoute per model.

Belongs here: values (`cluster.py`), objects made of them (`manifests.py`, `route.py`: pure), the thin half that sends
them (`client.py`, `target.py`), and what is counted (`metrics.py`). Does not: gates, verdicts, Prefect.
"""
