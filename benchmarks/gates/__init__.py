"""How often the gates are wrong, and how many requests they need: simulations beside the rules of Flagger, Argo
Rollouts and Kayenta on the same traffic. `python -m benchmarks.gates` prints one table.
"""
