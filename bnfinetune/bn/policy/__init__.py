"""Policies: what BN layers shall do, put on in place, saved, and exactly undone."""
