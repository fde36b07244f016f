"""Sources, shards, the index beside them, and the plan of batches."""
