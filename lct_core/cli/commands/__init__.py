"""The commands' options and help texts, one file each; importing one loads click and nothing of the library."""
