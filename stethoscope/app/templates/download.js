// Saves a file that the server has made for this page.
watch("value", () => {
  const file = JSON.parse(props.value), link = document.createElement("a");
  if (!file.content) return;
  link.href = URL.createObjectURL(new Blob([file.content], { type: file.type }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});
