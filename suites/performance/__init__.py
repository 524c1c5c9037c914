"""Speed, against stored baselines."""
