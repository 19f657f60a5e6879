"""What can answer or judge, found by name: vectors, mixes, policies of `rsf`, the start policy, judges."""
