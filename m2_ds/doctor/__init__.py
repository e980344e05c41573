"""Whether a job can run, told before it starts: machine, disk, recipe, data, and the ranks among each other."""
