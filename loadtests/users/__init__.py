"""What users do: one module per protocol. Only these modules and the locustfile import Locust."""
