"""Who talks to whom: the mesh of process groups and collectives with gradients."""
