"""Costs of nbdelta over its history; every number is better when it is smaller."""
