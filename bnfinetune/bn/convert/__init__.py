"""Changes of norm family: other layers in the place of BN."""
