"""Files that start a run on several machines: a Slurm batch script, a Kubernetes manifest, a hostfile."""
