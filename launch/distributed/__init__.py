"""Distributed processes: ranks, torchrun, devices, signals."""
