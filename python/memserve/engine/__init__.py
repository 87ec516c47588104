"""The only package that imports SGLang. Importing this module itself imports nothing."""
