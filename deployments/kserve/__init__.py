"""The KServe serving target: an InferenceService per version, routed by the same HTTPRoute as on plain Kubernetes.

Belongs here: the objects of a version (`manifests.py`: pure) and how they say that they are ready (`target.py`). All
the rest is `deployments.kubernetes`. KServe's own canary and ingress are not used.
"""
