"""The local target: Envoy in front of one model-server process per version, on this machine."""
