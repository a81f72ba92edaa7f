"""`adrank doctor`: what is wrong with an installation, and how to mend it. Looks at everything, changes nothing."""
