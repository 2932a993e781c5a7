"""Jobs on several machines: hosts reached by ssh, Slurm, Kubernetes."""
