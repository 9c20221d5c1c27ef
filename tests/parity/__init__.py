"""The same step by software that we did not write, or by a dense reference, and by ours under several layouts."""
