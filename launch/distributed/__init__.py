"""Processes of one job: ranks, torchrun, devices."""
