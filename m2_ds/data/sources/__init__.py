"""Sources of pairs: builders that write shards, and readers of formats that people already have."""
