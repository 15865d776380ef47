"""The BN doctor: rules that find pitfalls in any training set-up, and measurements of statistics against data."""
