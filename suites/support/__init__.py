"""What the claims stand on: cases, comparisons, power, gate, verdicts, machine, record."""
