"""Test-time adaptation: trained models made to fit unlabelled data of another domain."""
