# A package, so that gin finds what these files include from any working folder.
