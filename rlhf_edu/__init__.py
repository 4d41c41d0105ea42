"""rlhf_edu: the package behind the course. Nothing is loaded, and nothing is touched, before it is asked for."""

__version__ = "0.1.0"
