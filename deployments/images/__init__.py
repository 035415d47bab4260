"""Titleshot's images: the Dockerfile, and the same without a container engine (`build.py`)."""
