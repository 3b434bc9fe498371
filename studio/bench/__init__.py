"""`studio bench`: how much memory and time each method takes, as ratios against peers measured in the same run."""
