"""What users do, and how it is measured: Locust in a process of its own, never imported beside Prefect."""
