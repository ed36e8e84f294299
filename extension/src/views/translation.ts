/** The one function of JupyterLab's translation bundles that the views use, and its stand-in where there is none. */

export interface Translation {
  /** Translate `text`, putting `values` where it says %1, %2, … */
  __(text: string, ...values: (string | number)[]): string;
}

export const untranslated: Translation = {
  __: (text, ...values) =>
    text.replace(/%(\d+)/g, (match, digits: string) => String(values[Number(digits) - 1] ?? match))
};
