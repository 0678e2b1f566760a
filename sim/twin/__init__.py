"""Time and cost: the SimPy drivers, the workload, calibration, replay."""
