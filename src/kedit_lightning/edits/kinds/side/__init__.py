"""Side memories beside one projection, in shards that are merged (WISE)."""
