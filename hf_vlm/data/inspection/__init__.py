"""What a source holds and what is wrong with it: statistics, duplicates, the report."""
