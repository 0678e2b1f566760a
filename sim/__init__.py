"""The twin and the desk: the same machines on a simulated clock, and what people do with them."""
