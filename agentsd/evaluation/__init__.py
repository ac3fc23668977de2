"""How good images are: metrics of sets and pairs, experiments by protocol, their reports."""
