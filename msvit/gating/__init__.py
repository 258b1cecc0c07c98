"""Who decides: the gate, rules in its place, and the losses that shape a gate."""
