"""The work of the commands data, doctor, generate, inspect, merge, push and score, one file each."""
