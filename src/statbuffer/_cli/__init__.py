"""What is behind the command line: one module a concern, `verbs` ties them together."""
