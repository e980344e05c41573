"""Raw pairs to shards: read, clean, compare, score, balance, write; every record left out is counted by its rule."""
