"""The network: pure torch modules that know no process group but the one handed to their layers."""
