"""How good features are: oracles, probes, class activation maps, time and memory."""
