"""The work of the commands data, doctor, generate, inspect, list, merge, push and score, one file each."""
