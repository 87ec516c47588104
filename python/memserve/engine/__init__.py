"""Everything that touches SGLang; the only package that imports it. Importing this imports nothing."""
