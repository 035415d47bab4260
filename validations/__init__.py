"""What must be proven: the kernel (verdict, policy, promotion), pure, and the adapters that measure.

Belongs here: judgement, and turning data into measurements. Does not: Prefect, MLflow's server, Envoy, processes.
"""
