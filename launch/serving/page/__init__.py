"""The page of `tim serve`, in gradio: one file a section."""
