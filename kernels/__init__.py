"""The `shadowc::` ops, one a file. Deliberately free of imports: see CONTRIBUTING.md."""
